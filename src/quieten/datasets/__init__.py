r"""Readers of data as they are handed out; `data` has the sets by name.

emoji       Emoji: pictures from a font, and the groups that Unicode sorts them into.
idx         The MNIST family: finding, downloading and reading idx files.
image_sets  The image sets of the papers, as they are handed out: CIFAR-10, small ImageNet, CelebA, LSUN bedrooms.
pictures    Pictures: decoding one, folders and zips of them.
"""

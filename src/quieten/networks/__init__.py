r"""The networks of the papers, layer for layer; `nets` has our own.

dit       A transformer for latents: DiT.
fourier   Fourier features of a network's input, which let it see the last digits of the data.
mlp       A network of vectors that takes a time.
unet      The U-Nets of the papers, out of one: DDPM, improved DDPM, DDPM++, NCSN++, ADM.
vdm_nets  The networks of VDM and DiffEnc, layer for layer, so that their published settings can be trained.
"""

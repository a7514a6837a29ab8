r"""Pictures for people, and the pages that hold them; `report` writes a page.

chart           Quality against cost as inline SVG: drawn here, so that every point is a link, a tooltip and something to
                focus.
compare_report  The page of a comparison: curves, numbers, pictures of the same seeds, and all that is needed to do it
                again.
diagnosis_plot  The picture of a diagnosis: what is noisy where, what stable targets take away, and what a network could
                still learn.
plots           Pictures people look at: grids of images, training curves, quality against cost.
tune_curves     The course of a tuning as a picture: distance, energies, noise, running cost.
"""

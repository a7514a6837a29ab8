r"""What a learned forward process changes: kernel, costs, and the encoders by name; `encoder` has the encoders.

encoded        The process of a model that was trained with an encoder (DiffEnc): its kernel, its ODE, and what its
               denoiser returns.
encoded_costs  What each step of the bound costs a model that was trained with an encoder: for least-cost paths, as
               `grids.edge_costs`.
encoders       The encoders that recipes name: what they are built of, and the counterterm of the reverse process that
               goes with them.
"""

r"""Few-step fine-tuning: policies, values and energies, and the loop of `quieten tune`; `imitation` is the method.

adapters         Low-rank adapters: a few weights beside each layer of a frozen network, the only ones that are trained.
anomaly          Anomalies by an energy: trained by DxMI on features of normal data alone, on the unit sphere.
borrowed         A value network that starts from what the denoiser knows: its own encoder, read by a small head.
critics          Values and energies: how they are asked, kept still, averaged, and what is told of their answers.
descent          Steps on several losses, each with an optimiser of its own, and a look at whether they stay finite.
energies         Values and energies: networks of (x, k) that give one number per example, low where the data are.
monitor          What goes wrong while a policy is tuned, seen early and said in words.
pairs            States of trajectories with all that belongs to them, and the randomness of an iteration.
policy           Policies: a few Gaussian steps from noise to data, whose means and noise are tuned.
policy_gradient  What DxMI is compared with: policy gradients, and back-propagation through all the steps.
policy_schedule  Where a policy starts from: few-step grids, their noise, and steps other than the ancestral ones.
reconstruction   The energy of an autoencoder: high where it does not give an example back.
reward           Tuning a policy to a reward, near a reference: DxDP, the policy half of DxMI with a fixed energy E =
                 -reward.
running_cost     What a step of a policy costs: how far it moved, how little noise it left, and when it came.
settings         What can be chosen in few-step fine-tuning, and the optimisers that follow from it.
stored           Policies as files: the tuned network or its adapters, the noise of each step, and what it takes to build
                 the steps again.
tune             Tuning a model to a policy of few steps against data.
tune_loop        Stretches of tuning: iterations of a method, measurements of the averaged policy, the best kept, and the
                 watch over it.
tune_reward      Stretches of tuning to a reward: what the reward gains, less what leaving the first policy costs.
tune_start       What tuning starts from: levels, noise and network of a policy, its value, and the settings that suit few
                 examples.
tuned            The steps of a policy as a transition: the means of another, and noise that is trained.
yardstick        How far samples are from data that nobody trained on: what a checkpoint is chosen by.
"""

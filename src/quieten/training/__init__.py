r"""What training is made of: recipes, batches, the loop, and the folders it leaves; `fit` starts it.

augment  Augmentation that the network is told of, so that what it learns to draw are plain examples.
bundled  What comes with the library, by name: trained models, and beside each its variances, policies, classifier and
         statistics.
config   Recipes: YAML that is checked before anything runs, and what is built from it.
feed     Batches for training: keyed by the step, shared among processes, read ahead.
guess    A recipe for data that come without one.
hub      Runs on the Hugging Face hub: a repository there is the folder of a run, without what only training needs.
loop     The loop that all training shares: order, batches, signals, metrics, checkpoints, resume. What a step does is
         added to it.
parts    The choices of a recipe: a table from names to builders, and the builders that are not simply a class.
runs     Runs: folders that hold a recipe, its weights and all that training needs to go on.
schema   What a recipe says: its sections, their defaults and their checks.
source   What commands work on: a run, an exported file, a model of the zoo, or a diffusers pipeline, opened by name.
watch    What training watches: numbers that a device counts, and signals that ask to stop.
weights  Files of weights: tensors to bytes, tensors back from files, and into the modules they belong to.
"""

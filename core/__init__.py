"""LayerShap's engine: what each layer of a causal language model is worth.

Layers are players of a cooperative game whose utility is model quality on calibration text. The
engine measures coalitions, learns to predict the rest, and estimates contributions and
interactions; it knows nothing of the dashboard that shows them.
"""

"""Import and export of weights: the only package that knows other programs' names of tensors and config fields.

families/   one file a family of encoders or decoders: its config both ways, its tensors, its published sizes
rows        one parameter of ours and the tensors of theirs that it is made of
layouts     all rows of a checkpoint, and what a checkpoint cannot say
configs     config.json both ways
files/      safetensors, GGUF, pickles, the hub
read, match, write            tensors to parameters, and back
import_checkpoint, export_checkpoint, inspection      the three verbs of `convert`
"""

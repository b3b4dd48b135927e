"""Exit policies: which answers of Stage A stand, and what is promised of them. NumPy only, no torch.

``policy`` has their common form and their registry, ``target`` what they are asked for and what they guarantee,
``rows`` what they are fitted on. Exactly one policy is active in a folder.
"""

"""The frozen teacher: the model whose hidden states the student learns to give.

`opening` finds the family of a path; the families share the protocol in `protocol`.
"""

"""Changes that need a human's word: proposed, decided, bound to bytes, watched over, and put back.

`changes` is the inbox, `approvals` decides who may say yes and whether what was applied is what was approved, `guard`
finds what changed without a word, `revert` puts the approved state back. All of it fails closed.
"""

"""The reference pages of the documentation, made from what they describe: the configuration's schemas, the commands.

A page that is written by hand drifts away from the program; these cannot without a test failing.
"""

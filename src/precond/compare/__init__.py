"""Train several methods on one task under one budget, and report what came out.

Nothing is imported here: `precond.compare.session.compare` is the way in from Python and
`precond compare` from a shell. scikit-learn, matplotlib and rich (the extra `demo`) are imported
by the functions that use them.
"""

"""Padding audit: whether a clip's embedding depends on its batch, for our systems and for models of other packages."""

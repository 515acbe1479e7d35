"""Training of nano: a small π0.5 learned from recorded demonstrations by flow matching."""

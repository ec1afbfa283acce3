"""A run to look at: figures, portraits, atlas, review, laboratory"""

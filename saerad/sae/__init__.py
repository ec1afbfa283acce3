"""Sparse autoencoders: the model and its kinds, training, evaluation, others' checkpoints"""

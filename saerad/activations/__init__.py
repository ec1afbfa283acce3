"""The residual stream: recorded, stored, read back"""

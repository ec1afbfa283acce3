"""What reports do when a feature is pushed"""

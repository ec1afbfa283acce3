"""What a feature fires on, in words, and how good the words are"""

"""What only the findings of the book need"""

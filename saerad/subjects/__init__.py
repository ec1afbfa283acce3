"""The model under study: its prompts, and where every token comes from"""

"""Models that describe pictures: a local one through transformers, or a server with OpenAI's API.

Each takes `Question`s and returns as many `Answer`s.
"""

"""The command ``tokenlearn page``: sliders for tokens and concepts in a browser, on any model.

``studio`` does what the page offers and knows no browser; ``layout`` shows it by Gradio, and alone imports it.
"""

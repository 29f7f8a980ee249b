"""What the documentation site has beyond Sphinx's own."""

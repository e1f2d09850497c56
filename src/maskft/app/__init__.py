"""The playground: a base and several masks answer side by side."""

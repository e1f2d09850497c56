"""Vision-language models: composing, loading."""

"""Small checkpoints and data as folders: of every era, format and family, and their tokenizers."""

"""Light handles of what runs in the ranks: models, text encoders, VAEs, and what is added to them."""

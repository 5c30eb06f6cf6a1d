"""What host and ranks share: everything of the host side that a rank may import."""

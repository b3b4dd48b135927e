"""What proposes better heads from labels."""

"""What all stages share, in rooms; each imports only rooms on lower floors."""

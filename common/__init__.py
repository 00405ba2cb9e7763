"""What all stages share, in rooms; the floor of each is below that of the next. No room knows a
stage."""

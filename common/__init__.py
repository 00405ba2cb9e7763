"""What must be identical in every stage; knows no stage."""

"""Workers, the controller above them, and what they tell each other."""

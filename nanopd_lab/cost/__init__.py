"""What a step costs: from operations and bytes, and later from measured steps."""

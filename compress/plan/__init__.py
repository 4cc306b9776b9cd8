"""What a recipe would give, before a weight is read: sizes, decode speed by the roofline, memory, engines."""

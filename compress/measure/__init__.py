"""Measuring folders on disk: size, accuracy, tasks, length, speed."""

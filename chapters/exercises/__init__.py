"""The checks of the chapters' exercises: chNN.py holds exercise_1, exercise_2, ... of chapter NN.

Each takes the answer and asserts, every assertion with a hint that helps and gives nothing away.
"""

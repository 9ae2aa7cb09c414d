"""What people prefer: votes on pairs of pictures -> ratings with intervals, and how often one model is as good.

votes.py            the file of votes, a line a vote
bradley_terry.py    ratings of a matrix of wins, and their intervals
task.py             from the file to ratings, rates and a page
"""

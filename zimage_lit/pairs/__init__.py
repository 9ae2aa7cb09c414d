"""`lightning run pairs`: preference pairs for DPO, drawn from a model, judged, paired and looked over by a person.

task.py             the task: settings, drawing and judging, part by part
prompts.py          what is drawn, and from which seeds
selection.py        which of a prompt's pictures make pairs: pure functions of their scores
preference_set.py   the data set from the finished parts, and again after a review
review_page.py      the page on which a person keeps or drops pairs
"""

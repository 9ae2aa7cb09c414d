"""Reports of evaluations, made from their result folders alone: nothing is drawn, judged or scored here.

anchors.py       what has been published of five models
results.py       result folders as they are read
words.py         what judges said of a prompt, in words
difference.py    two models, prompt by prompt
contents.py      all that a report tells, as plain data: report.json
tables.py        its tables and sentences for people
chart.py         scores with intervals, and published ones, as a picture
page.py          all of it as HTML, with pictures
markdown.py      all of it as Markdown
write.py         the three files
tracking.py      the same in MLflow: metrics, a table with a row a prompt, the page
"""

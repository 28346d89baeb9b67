"""Reference and wrong answers of the chapters' exercises, one file a chapter, and what the tests of
the chapters share.
"""

"""The embedded data set: a miniature M-BEIR made of emoji.

Three artists draw the same 3,781 emoji; names, code points and a small table of country facts say
exactly what each drawing shows. From these the package writes all eight M-BEIR task types, with
traces that are right by construction, as a release folder in M-BEIR's own layout.

    wording    the English (and the Spanish and French) of people, hands, things and countries
    concepts   every emoji as a concept with attributes, captions and a split
    drawings   the artists' pictures, rendered from pinned packages
    edits      composed changes of a picture, in words, with their reasoning
    questions  questions of two hops: flag -> country -> fact, person -> job -> tool
    corpus     the generative corpus on which the base model learns to see and write
    release    queries, pools, qrels, traces, corpus -> the release folder
"""

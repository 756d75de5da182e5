"""Automatic interpretation: explain features, score the explanations, and say what the scores are worth.

After Paulo et al., "Automatically Interpreting Millions of Features in Large Language Models" (arXiv 2410.13928), with
the defects of its reference code mended and tested, and with controls beside every score.

    windows -> examples (explain and score halves, hard negatives) -> explainers -> scorers -> report
                                                    judge: client (HTTP) | local | a rule
"""

"""Files: how those of others are read, and how own ones are written.

reading     files of others: regular ones alone, and nothing that unpacks to far more than it is
writing     own files: whole or not at all
pickles     what torch.save wrote, looked through before torch.load makes anything of it
"""

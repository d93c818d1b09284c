"""How fast is an index built and asked, and is what it answers right?"""

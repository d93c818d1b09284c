"""What tokens keep, where they are: the paper's section 5.1 and localization."""

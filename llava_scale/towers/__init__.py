"""One encoder per modality, behind one interface."""

"""Workers: processes that train the stages of a network, and how they exchange tensors."""

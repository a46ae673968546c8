"""nvme: an NVM Express controller with one namespace."""

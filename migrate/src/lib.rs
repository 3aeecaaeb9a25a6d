//! The migration protocol core: phases, negotiation, convergence, commit; pure

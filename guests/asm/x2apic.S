/* What ipi.S does, with the local APICs in x2APIC mode, and what is new in that mode. */
#define X2APIC
#include "ipi.S"

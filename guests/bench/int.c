/* Integer work of the kind that CoreMark does: lists, small matrices, checksums, a state machine. */
#include "bench.h"

struct node {
	struct node *next;
	short key, data;
};

static int cmp_key(struct node *a, struct node *b)
{
	return a->key - b->key;
}

static int cmp_data(struct node *a, struct node *b)
{
	int d = (a->data & 0xff) - (b->data & 0xff);
	return d ? d : a->key - b->key;
}

/* Merge sort of a linked list. */
static struct node *msort(struct node *l, int (*cmp)(struct node *, struct node *))
{
	if (!l || !l->next)
		return l;
	struct node *s = l, *f = l->next;
	while (f && f->next) {
		s = s->next;
		f = f->next->next;
	}
	struct node *r = s->next;
	s->next = 0;
	l = msort(l, cmp);
	r = msort(r, cmp);
	struct node h, *t = &h;
	while (l && r) {
		if (cmp(l, r) <= 0) {
			t->next = l;
			t = l;
			l = l->next;
		} else {
			t->next = r;
			t = r;
			r = r->next;
		}
	}
	t->next = l ? l : r;
	return h.next;
}

/* Sorts 512 nodes by data, looks for eight keys, reverses the list, sorts it by key. */
u64 b_list(u64 n)
{
	enum { N = 512 };
	static struct node a[N];
	u32 s = 1;
	u64 h = 0;
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < N; i++) {
			a[i].next = i + 1 < N ? &a[i + 1] : 0;
			a[i].key = i;
			a[i].data = lcg(&s) >> 16;
		}
		struct node *l = msort(a, cmp_data);
		struct node *p, *q, *r = 0;
		for (int f = 0; f < 8; f++) {
			int want = (lcg(&s) >> 20) & 0xff;
			for (p = l; p && (p->data & 0xff) != want; p = p->next)
				;
			h = mix(h, p ? p->key : -1);
		}
		for (p = l; p; p = q) {
			q = p->next;
			p->next = r;
			r = p;
		}
		l = msort(r, cmp_key);
		int i = 0;
		for (p = l; p; p = p->next)
			h += (u64)p->data * ++i;
	}
	return h;
}

/* A product of 48x48 matrices of 16 bits, and bit fields of its elements. */
u64 b_matrix(u64 n)
{
	enum { N = 48 };
	static short a[N][N], b[N][N];
	static int c[N][N];
	u32 s = 7;
	u64 h = 0;
	for (int i = 0; i < N; i++)
		for (int j = 0; j < N; j++) {
			a[i][j] = lcg(&s) >> 18;
			b[i][j] = lcg(&s) >> 18;
		}
	for (u64 k = 0; k < n; k++) {
		for (int i = 0; i < N; i++)
			for (int j = 0; j < N; j++) {
				int t = 0;
				for (int q = 0; q < N; q++)
					t += a[i][q] * b[q][j];
				c[i][j] = t;
			}
		int m = 0;
		for (int i = 0; i < N; i++)
			for (int j = 0; j < N; j++) {
				int t = c[i][j];
				m += ((t >> 2) & 0xf) * ((t >> 5) & 0x7f);
				if (t > 1000)
					m++;
				a[i][j] += (short)k;
			}
		h = mix(h, m);
	}
	return h;
}

/* CRC-16 bit by bit over 512 bytes, CRC-32 by table over 4 KiB. */
u64 b_crc(u64 n)
{
	static u8 buf[4096];
	u32 s = 3;
	for (int i = 0; i < 4096; i++)
		buf[i] = lcg(&s) >> 24;
	u32 crc = 0;
	static u32 T[256];
	for (u32 i = 0; i < 256; i++) {
		u32 c = i;
		for (int j = 0; j < 8; j++)
			c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
		T[i] = c;
	}
	for (u64 k = 0; k < n; k++) {
		u16 c = crc;
		for (int i = 0; i < 512; i++) {
			u8 d = buf[i];
			for (int j = 0; j < 8; j++) {
				u8 x = (d ^ (u8)c) & 1;
				d >>= 1;
				if (x) {
					c ^= 0x4002;
					x = 1;
				}
				c >>= 1;
				if (x)
					c |= 0x8000;
			}
		}
		u32 q = ~crc;
		for (int i = 0; i < 4096; i++)
			q = T[(q ^ buf[i]) & 0xff] ^ (q >> 8);
		crc = q ^ c;
	}
	return crc;
}

/* What a number may turn out to be, as characters come. */
enum st { ST, INV, SC, INT_, FL, EX, SCI, NST };

/* Classifies 2000 characters of numbers, good and bad. */
u64 b_state(u64 n)
{
	static const char *pat[] = {
		"5012", "1234", "-874", "+122",
		"35.54400", ".1234500", "-110.700", "+0.64400",
		"5.500e+3", "-.123e-2", "-87e+832", "+0.6e-12",
		"T0.3e-1F", "-T.T++Tq", "1T3.4e4z", "34.0e-T^",
	};
	static char buf[2048];
	u32 s = 9;
	int L = 0;
	while (L < 2000) {
		const char *p = pat[(lcg(&s) >> 20) & 15];
		while (*p)
			buf[L++] = *p++;
		buf[L++] = ',';
	}
	u64 h = 0;
	u32 cnt[NST] = {0};
	for (u64 k = 0; k < n; k++) {
		enum st t = ST;
		for (int i = 0; i < L; i++) {
			char c = buf[i];
			if (c == ',') {
				cnt[t]++;
				t = ST;
				continue;
			}
			int dg = c >= '0' && c <= '9';
			switch (t) {
			case ST:
				t = dg ? INT_ : (c == '+' || c == '-') ? SC : c == '.' ? FL : INV;
				break;
			case SC:
				t = dg ? INT_ : c == '.' ? FL : INV;
				break;
			case INT_:
				if (c == '.')
					t = FL;
				else if (!dg)
					t = INV;
				break;
			case FL:
				if (c == 'e' || c == 'E')
					t = EX;
				else if (!dg)
					t = INV;
				break;
			case EX:
				t = (c == '+' || c == '-') ? SCI : INV;
				break;
			case SCI:
				if (!dg)
					t = INV;
				break;
			default:
				break;
			}
		}
		/* Stores that leave the text as it was. */
		buf[(k * 7) % L] ^= (k & 8) ? 1 : 0;
		buf[(k * 7) % L] ^= (k & 8) ? 1 : 0;
		h += cnt[INT_];
	}
	for (int i = 0; i < NST; i++)
		h = mix(h, cnt[i]);
	return h;
}

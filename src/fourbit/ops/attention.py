"""TEMPORARY stand-in, replaced by the attention branch."""
import torch
def _ref(q,k,v,first,scale,softcap):
    B,T,H,D=q.shape; G=H//k.shape[2]
    s=torch.einsum("bthd,bshd->bhts",q.float(),k.float().repeat_interleave(G,2))*scale
    if softcap: s=softcap*torch.tanh(s/softcap)
    t=torch.arange(T); ok=(t[None,:]<=t[:,None])[None]
    if first is not None: ok=ok&(t[None,None,:]>=first[:,:,None])
    s=s.masked_fill(~ok[:,None],float("-inf")); lse=torch.logsumexp(s,-1); p=torch.softmax(s,-1)
    return torch.einsum("bhts,bshd->bthd",p,v.float().repeat_interleave(G,2)),lse
def attention_forward(q,k,v,first,*,scale,softcap,out):
    o,lse=_ref(q,k,v,first,scale,softcap); out.copy_(o); return lse
def attention_backward(g,q,k,v,o,lse,first,*,scale,softcap,dq,dk,dv):
    with torch.enable_grad():
        a=[t.detach().float().requires_grad_() for t in (q,k,v)]
        o2,_=_ref(*a,first,scale,softcap)
        gs=torch.autograd.grad(o2,a,g.float())
    for d,x in zip((dq,dk,dv),gs): d.copy_(x)

package marwright;

import io.netty.channel.ChannelHandlerAdapter;
import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelInboundHandlerAdapter;
import io.netty.channel.ChannelPipeline;
import io.netty.handler.codec.http.HttpServerCodec;

/**
 * Comes where TorchServe adds netty's codec to a connection (org.pytorch.serve.ServerInitializer),
 * and makes way for that codec, with one handler before it that sees bytes and one after it that
 * sees requests and answers.
 */
public final class Door extends ChannelHandlerAdapter {
    @Override
    public void handlerAdded(ChannelHandlerContext ctx) {
        Gate gate = new Gate();
        ChannelPipeline pipeline = ctx.pipeline();
        pipeline.addLast("marwright.clock", new ChannelInboundHandlerAdapter() {
            @Override
            public void channelRead(ChannelHandlerContext context, Object bytes) {
                gate.startClock();
                context.fireChannelRead(bytes);
            }
        });
        pipeline.addLast("marwright.codec", new HttpServerCodec());
        pipeline.addLast("marwright.gate", gate);
        pipeline.remove(this);
    }
}
